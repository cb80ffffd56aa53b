-- The contract is as before, but for a budget with the limit of another policy than the one that decided: it is given the limit
-- of this one, unless an operator set its own. One that is found to have it already costs nothing more.
CREATE OR REPLACE FUNCTION engine_reserve_v4(p_tenant uuid, p_reserve jsonb) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_entry  jsonb;
    v_kind   text;
    v_scope  uuid;
    v_unit   text;
    v_period text;
    v_starts timestamptz;
    v_amount numeric;
    v_limit  numeric;
    v_taken  boolean;
    v_done   jsonb := '[]';
BEGIN
    FOR v_each IN 0 .. jsonb_array_length(p_reserve) - 1 LOOP
        v_entry := p_reserve -> v_each;
        v_kind := v_entry ->> 'scope_kind';
        v_scope := (v_entry ->> 'scope_id')::uuid;
        v_unit := v_entry ->> 'unit';
        v_period := COALESCE(v_entry ->> 'period', 'total');
        v_starts := CASE v_period WHEN 'total' THEN to_timestamp(0) ELSE date_trunc(v_period, clock_timestamp(), 'UTC') END;
        v_amount := (v_entry ->> 'amount')::numeric;
        v_limit := (v_entry ->> 'limit')::numeric;
        IF v_amount < 0 THEN
            RAISE EXCEPTION USING ERRCODE = 'check_violation', MESSAGE = format(
                '%s %s cannot be reserved: an amount is never below zero', v_amount, v_unit);
        END IF;
        FOR v_try IN 1..2 LOOP
            IF v_amount = 0 THEN
                PERFORM FROM budgets
                    WHERE tenant_id = p_tenant AND scope_kind = v_kind AND scope_id = v_scope AND unit = v_unit
                      AND period = v_period AND starts_at = v_starts AND spent + reserved <= limit_amount
                      AND (v_limit IS NULL OR limit_amount = v_limit OR pinned);
            ELSE
                UPDATE budgets SET reserved = reserved + v_amount
                    WHERE tenant_id = p_tenant AND scope_kind = v_kind AND scope_id = v_scope AND unit = v_unit
                      AND period = v_period AND starts_at = v_starts AND spent + reserved + v_amount <= limit_amount
                      AND (v_limit IS NULL OR limit_amount = v_limit OR pinned);
            END IF;
            v_taken := FOUND;
            EXIT WHEN v_taken OR v_try = 2 OR v_limit IS NULL;
            PERFORM engine_open_budget_v2(p_tenant, v_entry, v_starts);
        END LOOP;
        IF NOT v_taken THEN
            PERFORM engine_release_v2(p_tenant, v_done);
            RETURN engine_unaffordable_v2(p_tenant, v_entry, v_starts);
        END IF;
        v_done := v_done || (v_entry || jsonb_build_object('starts_at', v_starts));
    END LOOP;
    RETURN jsonb_build_object('reserved', v_done);
END
$$;
