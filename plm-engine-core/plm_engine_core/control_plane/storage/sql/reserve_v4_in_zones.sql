-- The contract is as before, but for windows: the zone in which an entry is counted says when the next one begins, and while one
-- runs nothing is set aside elsewhere. The budget of an entry in UTC is found by its start, as ever; the rest is looked for.
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
    v_found  boolean;  -- the window was looked for, else it is the one in UTC
    v_done   jsonb := '[]';
BEGIN
    FOR v_each IN 0 .. jsonb_array_length(p_reserve) - 1 LOOP
        v_entry := p_reserve -> v_each;
        v_kind := v_entry ->> 'scope_kind';
        v_scope := (v_entry ->> 'scope_id')::uuid;
        v_unit := v_entry ->> 'unit';
        v_period := COALESCE(v_entry ->> 'period', 'total');
        v_found := v_entry ? 'time_zone';
        v_starts := CASE WHEN v_period = 'total' THEN to_timestamp(0)
                         WHEN v_found THEN engine_window_in_use_v1(p_tenant, v_entry, clock_timestamp())
                         ELSE date_trunc(v_period, clock_timestamp(), 'UTC') END;
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
                      AND period = v_period AND starts_at = v_starts AND (v_found OR ends_at IS NULL)
                      AND spent + reserved <= limit_amount
                      AND (v_limit IS NULL OR limit_amount = v_limit OR pinned);
            ELSE
                UPDATE budgets SET reserved = reserved + v_amount
                    WHERE tenant_id = p_tenant AND scope_kind = v_kind AND scope_id = v_scope AND unit = v_unit
                      AND period = v_period AND starts_at = v_starts AND (v_found OR ends_at IS NULL)
                      AND spent + reserved + v_amount <= limit_amount
                      AND (v_limit IS NULL OR limit_amount = v_limit OR pinned);
            END IF;
            v_taken := FOUND;
            EXIT WHEN v_taken OR v_try = 2 OR v_limit IS NULL;
            v_found := true;
            v_starts := engine_open_window_v1(p_tenant, v_entry);
            IF v_starts IS NULL THEN
                PERFORM engine_release_v2(p_tenant, v_done);
                RETURN engine_unknown_zone_v1(v_entry);
            END IF;
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
